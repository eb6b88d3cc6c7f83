"""Speed, measured as ratios in one run: `halfbyte bench`."""
