"""A reward of one's own, for --reward examples/last_number.py:last_number: is the last number of the response right?"""


def last_number(response, answer):
    """1 if the last number in the response equals the answer, else 0."""
    kept = "".join(char if char in "0123456789.-" else " " for char in response.replace(",", ""))
    for word in reversed(kept.split()):
        try:
            return int(float(word.rstrip(".-")) == float(answer))
        except ValueError:                                                     # such as 7-5, or a dash
            continue
    return 0
