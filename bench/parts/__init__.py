"""What the benchmarks are made of; the programs are the files in bench/."""
