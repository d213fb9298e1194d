class InputError(Exception):
    """Bad input; the message is one sentence for the user that says what is wrong and what to do."""
