"""`make bench`: the regression guard of speed and memory. Not collected by pytest."""
