"""A small server for people and for programs that speak the completions part of the OpenAI API."""
