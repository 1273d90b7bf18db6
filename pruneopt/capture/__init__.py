"""What reaches a layer: calibration batches walked through the program, and their sums."""
