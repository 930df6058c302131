"""Information-aware policy optimization on verl. Kept free of imports: verl loads it in every process."""

__version__ = "0.1.0"
