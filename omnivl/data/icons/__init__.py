"""Builds shards from the npm package of all icon sets: drawings by many hands, with names and licences."""
