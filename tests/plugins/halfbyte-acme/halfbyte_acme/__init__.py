"""The package is empty on purpose: importing the plugin must import nothing heavy."""
