"""The results of a run, and of several side by side: put together, written as tables and figures, read back."""
