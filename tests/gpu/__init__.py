"""`make gpu`: everything that a GPU is needed for, measured and checked in one run of minutes. See docs/gpu.md."""
