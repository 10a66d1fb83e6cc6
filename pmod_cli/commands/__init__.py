"""One thin module a verb: parse, build a settings object, call one library function, render."""
