"""What every room uses: errors, output, and writing that can be killed. Imports nothing heavy."""
