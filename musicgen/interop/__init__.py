"""Other projects' MusicGen models in, ours out: transformers folders and audiocraft files.

`parts` is a model taken apart, the form that everything passes through; `huggingface` and `audiocraft` read and write
theirs; `sources` finds what MODEL=, INIT= and FROM= name; `command` is `make import` and `make export`.
"""
