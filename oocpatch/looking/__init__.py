"""Looking at volumes and results: pictures and reports, by reads of bounded memory."""
