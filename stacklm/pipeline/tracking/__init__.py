"""MLflow as a view: runs are created from the files that training writes; training itself never calls MLflow.

    run        one training run, read from its files: metadata and metrics (no MLflow)
    store      where runs are stored: the project's own database or the user's choice; connection and experiment
    artifacts  MLflow plugin that resolves artifacts relative to the database, wherever the project is
    mirror     updates one run and its parent in MLflow
    weights    logs a trained model, and registers it with an alias on the best one
    pages      notes and the saved view of charts in MLflow's UI
    lab        experiments of the lab: a summary run per arm, with its trials
    sync       updates MLflow with everything published, and with a run in progress
    ui         MLflow's UI in one process

A run is found by its fingerprint, and only what is missing is logged, so every step can be repeated, also after a kill.
"""
