"""Settings: `params.yaml` read into frozen, typed dataclasses, one file per section.

A stage imports only the sections it reads, so that a change to the code of one section makes only the stages that use it stale.
`stacklm.config.params` combines the sections.
"""
