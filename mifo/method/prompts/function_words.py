"""The closed word classes of English, whose tokens no pixel attends to during masked synthesis.

They are the words of the Penn Treebank tags CC, CD, DT, EX, IN, MD, PDT, POS, PRP, PRP$, RP, TO, UH, WDT, WP
and WRB, and "left", "right", "top", "bottom", which Bounded Attention (arXiv 2403.16990) filters from prompts
by a tagger. A word that is also a common noun or adjective of pictures ("can", "may", "will", "like") is
listed by its tag here; inside a phrase that has a box it is not filtered.
"""

_WORDS = (
    # CC, coordinating conjunctions
    "and or but nor yet so plus minus versus vs & either neither both "
    # CD, cardinal numbers (digits are recognised by form)
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand "
    "million billion dozen "
    # DT and PDT, determiners
    "a an the this that these those each every some any no another all half such quite many "
    # EX and IN, existential there, prepositions and subordinating conjunctions
    "there about above across after against along alongside amid among amongst around as astride at atop "
    "because before behind below beneath beside besides between beyond by concerning despite during except "
    "for from if in inside into like near of off on onto out outside over past per since than though "
    "although through throughout till toward towards under underneath unless unlike until up upon via while "
    "whereas whether with within without "
    # MD, modal verbs
    "can cannot could may might must ought shall should will would 'd 'll "
    # POS, possessive endings
    "' 's "
    # PRP and PRP$, pronouns
    "i me my mine myself you your yours yourself yourselves he him his himself she her hers herself it its "
    "itself we us our ours ourselves they them their theirs themselves oneself "
    # RP, particles
    "away back down forth "
    # TO and UH, to and interjections
    "to ah aha alas bye hello hey hi oh ok okay oops ouch please uh wow yeah yes "
    # WDT, WP and WRB, wh-words
    "which what whatever whichever who whom whose whoever whomever how however when whenever where wherever "
    "why "
    # Positions in the picture
    "left right top bottom"
)

FUNCTION_WORDS = frozenset(_WORDS.split())


def is_function_word(word: str) -> bool:
    """Whether a lower-case word, or a number in digits, belongs to the closed classes."""
    return word in FUNCTION_WORDS or word.isdecimal()
