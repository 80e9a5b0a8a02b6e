"""The demo catalogue: public-domain tunes and composed pieces, arranged and rendered by a seeded program."""
