"""Plans: YAML to one frozen, typed value, with every mistake named."""
