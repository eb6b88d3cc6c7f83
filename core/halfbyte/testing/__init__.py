"""The conformance kit: checks that any backend runs against itself.

    pytest -p halfbyte.testing.plugin --backend acme --pyargs halfbyte.testing.checks

draw.py      portable random tensors          samples.py   arguments for every op, made from facts
cases.py     kernels x facts to test          compare.py   what "agrees" means
golden/      expected results of an oracle    mutants.py   backends that are wrong on purpose
checks/      the checks, one file per theme   plugin.py    pytest's options, parameters and the table
"""
