"""MLflow as a view: runs are projected from the files that training leaves, and training never talks to it.

    run      what a pretraining is, as far as files tell (no MLflow)
    curves   rows by step turned into MLflow's metrics (no MLflow)
    notes    the texts that explain a run and the experiment
    view     the saved page of charts that answers a comparison's questions
    tracker  where runs go: address, time limits, the experiment
    mirror   one run, brought up to date in MLflow
    weights  a trained model as MLflow keeps it: safetensors with a signature
    sync     everything published, brought up to date
    follow   a run that is training, brought up to date every two seconds by a process beside it
    ui       MLflow's pages in one light process

A run is found by its fingerprint and gets only what it lacks, so every step may be repeated, or killed and repeated.
"""
