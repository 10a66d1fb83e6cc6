"""From a question to an answer that is streamed: in the terminal (`conversation`) and over HTTP (`app`).

`generation` runs rows that join and leave a batch, `text` makes words of their ids; both ways use them.
"""
