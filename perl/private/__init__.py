"""The undocumented interfaces of other libraries that PERL uses: one file per library, checked on import."""
