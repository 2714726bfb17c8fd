//! Storage that cannot grow, as devices and exports are, and rows of clusters longer than what a block counts.

use super::*;
use crate::storage::power::Power;
use crate::{ReadInto, WriteFrom};

fn open(storage: Arc<dyn Storage>) -> Qcow2 {
    let path = Path::new("room");
    let header = Qcow2::read_header(path, storage.as_ref()).unwrap();
    Qcow2::open(path, storage, header, Parts::default()).unwrap()
}

/// What the storage holds, whatever of it is stable.
fn all(power: &Power) -> Vec<u8> {
    power.cut(&[], power.moment(), || 0)
}

/// A new image at the beginning of a device of so many bytes.
fn on_device(options: &CreateOptions, len: u64) -> (Vec<u8>, Arc<Power>) {
    let file = Arc::new(Power::default());
    drop(Qcow2::create(Path::new("room"), file.clone(), options, Parts::default()).unwrap());
    let mut bytes = all(&file);
    bytes.resize(size(len), 0);
    (bytes.clone(), Arc::new(Power::device(bytes)))
}

#[test]
fn what_was_written_before_a_device_was_full_is_kept() {
    // The second one's first cluster behind its end would be the next refcount block.
    for (cluster_bits, len) in [(16, 40 << 16), (9, 256 * 512 * 4)] {
        let options = CreateOptions { cluster_bits, ..CreateOptions::new(8 << 20) };
        let (start, device) = on_device(&options, len);
        let image = open(device.clone());
        let cluster = 1u64 << cluster_bits;
        let content = |number: u64| vec![number as u8 % 251 + 1; size(cluster)];
        let write = |number: u64| image.write(number * cluster, &WriteFrom(&content(number)));
        let mut written = 0;
        let error = loop {
            match write(written) {
                Ok(()) => written += 1,
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        assert!(written * cluster > len * 3 / 4, "{written} clusters of {cluster}");
        // It stays full, and what was answered is made stable.
        assert!(write(written).is_err());
        image.flush().unwrap();
        let after = open(Arc::new(Power::new(device.cut(&start, device.moment(), || 255))));
        assert!(after.check(Repair::Nothing).unwrap().is_clean());
        for number in 0..written {
            let mut bytes = vec![0; size(cluster)];
            after.read(number * cluster, &ReadInto::new(&mut bytes)).unwrap();
            assert!(bytes == content(number), "cluster {number} of {written}");
        }
        // What is given back has room for others.
        image.discard(0, cluster).unwrap();
        image.flush().unwrap();
        write(written).unwrap();
        image.close().unwrap();
    }
}

#[test]
fn an_image_on_a_device_can_be_repaired() {
    let options = CreateOptions { lazy_refcounts: true, ..CreateOptions::new(8 << 20) };
    let (start, device) = on_device(&options, 64 << 16);
    let image = open(device.clone());
    image.write(1 << 20, &WriteFrom(&[7; 1 << 20])).unwrap();
    image.flush().unwrap();
    // Its host crashes: nothing of this is counted.
    let crashed = device.cut(&start, device.moment(), || 0);
    drop(image);
    let image = open(Arc::new(Power::device(crashed)));
    assert!(image.check(Repair::Nothing).unwrap().is_clean());
    let mut bytes = vec![0; 1 << 20];
    image.read(1 << 20, &ReadInto::new(&mut bytes)).unwrap();
    assert!(bytes == [7; 1 << 20]);
    image.write(0, &WriteFrom(&[8; 1 << 20])).unwrap();
    image.close().unwrap();
}

#[test]
fn a_row_may_be_longer_than_what_a_block_counts() {
    let file = Arc::new(Power::default());
    let options = CreateOptions { cluster_bits: 9, ..CreateOptions::new(1 << 30) };
    let image = Qcow2::create(Path::new("room"), file.clone(), &options, Parts::default()).unwrap();
    image.write(1 << 29, &WriteFrom(&[7; 4096])).unwrap();
    image.create_snapshot("a", 0, 0).unwrap();
    image.write(1 << 29, &WriteFrom(&[8; 4096])).unwrap();
    image.resize(2 << 30).unwrap();
    image.apply_snapshot("a").unwrap();
    image.empty().unwrap();
    image.apply_snapshot("a").unwrap();
    assert!(image.check(Repair::Nothing).unwrap().is_clean());
    image.close().unwrap();
    drop(image);
    assert!(file.len() < 16 << 20, "{} bytes", file.len());
    let image = open(file);
    assert!(image.check(Repair::Nothing).unwrap().is_clean());
    let mut bytes = [0; 4096];
    image.read(1 << 29, &ReadInto::new(&mut bytes)).unwrap();
    assert_eq!(bytes, [7; 4096]);
}
