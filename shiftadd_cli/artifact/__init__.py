"""The checkpoint folder that shiftadd writes: its format, the streaming writer and the verification."""
