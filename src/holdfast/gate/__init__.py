"""The gate: may this model be released, given how much its owner is willing to forget?"""
