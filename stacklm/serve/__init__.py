"""A small server with a web page and the completions endpoint of the OpenAI API."""
