"""What a run learned and what it forgot: tables, figures and one HTML page that opens offline."""
