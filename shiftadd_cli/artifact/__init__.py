"""The folder we write: its format, the streaming writer, and its verification."""
