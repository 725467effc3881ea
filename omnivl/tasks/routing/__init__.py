"""The ``routing`` task: which expert takes which patch and which word."""
