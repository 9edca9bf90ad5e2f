"""MLflow as a view: runs are projected from the files that training leaves, and training never talks to it.

    run        what a pretraining is, as far as files tell: facts and curves (no MLflow)
    store      where runs are kept: a database of our own, or what the user names; the connection and the experiment
    artifacts  MLflow's plugin that finds artifacts beside the database, wherever the project is
    mirror     one run and its parent, brought up to date in MLflow
    weights    a trained model as MLflow keeps it, and the registered model with an alias on the better one
    pages      what MLflow's pages say and show: notes and the saved view of charts
    lab        experiments of the lab: a summary for each arm, with its trials
    sync       everything published, and a run that is training, brought up to date
    ui         MLflow's pages in one light process

A run is found by its fingerprint and gets only what it lacks, so every step may be repeated, or killed and repeated.
"""
