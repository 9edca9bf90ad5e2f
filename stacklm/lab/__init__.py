"""The lab: experiments over several seeds, and verdicts with intervals."""
