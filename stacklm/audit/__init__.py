"""The audit: a certificate that a model, and the way it is trained, cannot see the tokens that are to be predicted.

    probe         a model in a state in which it can be tested, and the sequences to test it with
    causality     what a model's outputs and gradients depend on
    data          which tokens the batches and the loss ask for; what can be learned from random tokens: nothing
    audit         all of it for one model: the certificate, and the stage of the pipeline

A check is a function that returns what it found, or raises `Fault` with the fault's name. The first paragraph of its docstring is
what it claims.
"""


class Fault(Exception):
    """A claim that does not hold; the message names what is wrong."""


class AuditError(RuntimeError):
    """A model that must not be trained; the message names the faults."""
