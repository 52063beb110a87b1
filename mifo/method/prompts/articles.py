"""The indefinite article of a prompt's nouns."""


def article(phrase: str) -> str:
    """ "an" before a phrase that begins with a vowel letter, else "a"."""
    return "an" if phrase[0].lower() in "aeiou" else "a"
