"""The same facts as text, tables and pages."""
