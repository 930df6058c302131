"""Speed and memory, as ratios that survive a noisy machine. Nothing here is a test; results are in README.md."""
