"""What a mixin stands in front of: a stock class, known only when a model is made, which has all that it uses."""

from typing import Any

Stock: Any = object
"""The base of our mixins. To a type checker it is anything; at run time it adds nothing."""
