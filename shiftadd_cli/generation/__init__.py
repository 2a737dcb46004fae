"""Text from a loaded model: the prompt, the settings, the stream, and the speed."""
