//! A histogram of latencies: exact to 1/64 from nanoseconds to minutes, in a few kilobytes.

/// Buckets of equal width between a power of two and the next.
const STEPS: u64 = 64;
const STEP_BITS: u32 = STEPS.trailing_zeros();
/// Nanoseconds up to 2^40, 18 minutes; what took longer counts as that.
const MAX_BITS: u32 = 40;

#[derive(Debug, Clone)]
pub struct Latencies {
    counts: Vec<u64>,
    total: u64,
}

impl Default for Latencies {
    fn default() -> Self {
        Self { counts: vec![0; bucket(u64::MAX) + 1], total: 0 }
    }
}

impl Latencies {
    pub fn record(&mut self, ns: u64) {
        self.counts[bucket(ns)] += 1;
        self.total += 1;
    }

    pub fn add(&mut self, other: &Self) {
        for (count, more) in self.counts.iter_mut().zip(&other.counts) {
            *count += more;
        }
        self.total += other.total;
    }

    /// The latency in nanoseconds that `share` (0 to 1) of the requests did not exceed; 0 if there were none.
    pub fn quantile(&self, share: f64) -> u64 {
        let wanted = (self.total as f64 * share).ceil() as u64;
        let mut seen = 0;
        for (index, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= wanted.max(1) {
                return upper_end(index);
            }
        }
        0
    }
}

fn bucket(ns: u64) -> usize {
    let ns = ns.min((1 << MAX_BITS) - 1);
    let shift = (u64::BITS - ns.leading_zeros()).saturating_sub(STEP_BITS + 1);
    (u64::from(shift) * STEPS + (ns >> shift)) as usize
}

/// The largest value of a bucket.
fn upper_end(bucket: usize) -> u64 {
    let bucket = bucket as u64;
    let shift = (bucket / STEPS).saturating_sub(1);
    ((bucket - shift * STEPS + 1) << shift) - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_lies_in_its_bucket_and_near_its_end() {
        for ns in
            (0..200).chain((8..40).flat_map(|bits| [(1 << bits) - 1, 1 << bits, (1 << bits) + 12345 % (1 << bits)]))
        {
            let end = upper_end(bucket(ns));
            assert!(end >= ns && end - ns <= ns / STEPS, "{ns} ends at {end}");
            assert!(bucket(ns) == 0 || upper_end(bucket(ns) - 1) < ns, "{ns}");
        }
    }

    #[test]
    fn quantiles_are_those_of_what_was_recorded() {
        let (mut one, mut two) = (Latencies::default(), Latencies::default());
        (1..=500).for_each(|ns| one.record(ns * 1000));
        (501..=1000).for_each(|ns| two.record(ns * 1000));
        one.add(&two);
        for (share, exact) in [(0.5, 500_000u64), (0.99, 990_000), (0.999, 999_000), (1.0, 1_000_000)] {
            let found = one.quantile(share);
            assert!(found >= exact && found - exact <= exact / STEPS, "{share}: {found}");
        }
        assert_eq!(Latencies::default().quantile(0.5), 0);
    }

    #[test]
    fn what_took_forever_counts_as_the_longest() {
        let mut latencies = Latencies::default();
        latencies.record(u64::MAX);
        assert_eq!(latencies.quantile(0.5), (1 << MAX_BITS) - 1);
    }
}
