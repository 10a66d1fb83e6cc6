"""One selection a file, called like the name that it registers; `model/selection.py` has what all of them share."""
