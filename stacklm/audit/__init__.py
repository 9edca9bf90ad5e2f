"""The audit: a certificate that a model and the way it is trained can not see the tokens that are to be predicted.

    certificate   checks by name, what each claims and what it found; as a table and as JSON
    probe         a model in a state in which it can be looked at, and the windows to look with
    causality     what a model's outputs and gradients depend on
    data          which tokens the batches and the loss ask for
    floor         what can be learnt from random tokens: nothing
    audit         all of it for one model; the stage of the pipeline

A check is a function that returns what it found, or raises `Fault` with the fault by its name.
"""
