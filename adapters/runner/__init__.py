"""A host's own script, unedited, with the refiner attached: the stages of `python -m semples_plugin.adapters`.

Flow: `job` (what is asked for) -> `stages` (match, prompt, refine, plain) -> `process` (the script in this process),
`collector` (what prompts are learned from), `dry_run` (a few steps, described), `record` (how far a run came). `compat` holds
what old hosts need in a current environment.
"""
