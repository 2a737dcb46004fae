"""Files that survive a kill: atomic replacement, a journal, and errors that name the cure."""
