"""Settings: `params.yaml` read into frozen, typed dataclasses, one file per section.

A stage imports only the sections it reads, so that a change of one section's code makes only the
stages behind it stale. `stacklm.config.params` puts the sections together.
"""
