"""What the torch ops and the NumPy front end share. Imports neither torch nor NumPy."""
