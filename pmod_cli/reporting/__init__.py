"""What was found, in each form: tables for the terminal, Markdown and CSV (`tables`), and HTML pages (`html`).

JSON is written by `core`: `output.print_json` and `atomic.write_json`.
"""
