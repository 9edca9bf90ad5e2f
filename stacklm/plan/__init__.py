"""What a run will take, before it runs.

`plan` gathers the figures of every model and `text` writes them for people. Memory comes from `memory`, which lets the
trainer's own step run on tensors without data, and from `heap`, which asks the C library how it would lay them out.
`levers` are the settings that make a run smaller. `claims` puts the published claims beside the arithmetic.
"""
