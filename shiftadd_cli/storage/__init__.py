"""Files that survive a kill: replaced in one step, journaled, and refused in words that name the cure."""
