//! One cluster of the file shown at several places of the disk.

use super::table::{COMPRESSED, Entry, Mapping};
use super::{CLUSTER_LOCKS_MASK, Qcow2, lock};
use std::io;
use std::sync::MutexGuard;

impl Qcow2 {
    /// Shows the cluster at `from`, which was written, at `to` as well, where nothing is: both are one cluster of the file.
    /// `Unsupported` where it has as many users as can be counted.
    ///
    /// For images that are written once and read from then on: nothing else may write them meanwhile. When one of the places is
    /// written later it gets a cluster of its own, as ever; the flag of the other then says "shared" of a cluster with one user,
    /// which costs a copy, and which a check finds and repairs.
    pub fn share_cluster(&self, from: u64, to: u64) -> io::Result<()> {
        let invalid = |what: &str| Err(io::Error::new(io::ErrorKind::InvalidInput, what.to_owned()));
        let cluster = self.shape.cluster();
        if self.shape.extended
            || self.shape.data_file
            || self.shape.within(from) != 0
            || self.shape.within(to) != 0
        {
            return invalid("only whole clusters of plain images are shared");
        }
        {
            let _pass = self.gate.pass();
            self.check_write(from, cluster)?;
            self.check_write(to, cluster)?;
            self.open_for_change()?;
            self.live.mark(to, cluster);
            let _clusters = self.lock_two(from, to);
            let source = self.writable_table(from)?.entry(self.shape.l2_index(from));
            let old = self.writable_table(to)?.entry(self.shape.l2_index(to));
            if source.mapping(&self.shape, 0) != Mapping::Data {
                return invalid("there is nothing to be shared");
            }
            if old == Entry::BROKEN || old.has_host(&self.shape) || old.word & COMPRESSED != 0 {
                return invalid("something is there already");
            }
            let shared = Entry { word: source.host(), bitmap: 0 };
            self.refcounts.add(self.storage.as_ref(), source.host() >> (self.shape.cluster_bits & 63), 1)?;
            self.set_entries(from, &[(from, source, shared)])?;
            self.set_entries(to, &[(to, old, shared)])?;
        }
        self.limit_dirty()
    }

    /// The locks of two clusters, in their order.
    fn lock_two(&self, one: u64, other: u64) -> Vec<MutexGuard<'_, ()>> {
        let number = |offset: u64| offset >> (self.shape.cluster_bits & 63) & CLUSTER_LOCKS_MASK;
        let (first, second) = (number(one).min(number(other)), number(one).max(number(other)));
        let numbered = (0u64..).zip(&self.clusters);
        numbered
            .filter(|(number, _)| *number == first || *number == second)
            .map(|(_, mutex)| lock(mutex))
            .collect()
    }
}
