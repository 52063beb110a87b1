"""Tables of many runs: what to run, what is missing, and what it all says with which certainty."""
