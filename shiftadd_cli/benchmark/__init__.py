"""How fast a compressed model is: whole models beside each other, and its layers beside dense ones."""
