"""Speed of a compressed model: full models compared in turns, and its layers compared with dense layers."""
