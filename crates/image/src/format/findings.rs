//! What a check of an image looks for and finds, the same for all formats.

/// Findings that are told in words.
const MESSAGES_MAX: usize = 1000;

/// What a check is to repair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Repair {
    /// Nothing.
    Nothing,
    /// Space of the file that is taken and not used.
    Leaks,
    /// All that can be.
    All,
}

/// What a check has found. Formats have clusters, blocks or grains: here all are called clusters.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Findings {
    /// Things that break the rules and can cost data.
    pub corruptions: u64,
    /// Clusters that are taken and not used.
    pub leaks: u64,
    /// Corruptions that were repaired.
    pub corruptions_fixed: u64,
    /// Leaks that were repaired.
    pub leaks_fixed: u64,
    /// Things that could not be checked.
    pub errors: u64,
    /// Clusters of the disk.
    pub total_clusters: u64,
    /// Those that are in the file.
    pub allocated_clusters: u64,
    /// Those that do not follow the cluster before.
    pub fragmented_clusters: u64,
    /// Those that are compressed.
    pub compressed_clusters: u64,
    /// Where the last used cluster of the file ends.
    pub image_end_offset: u64,
    /// The findings in words, as many as are kept.
    pub messages: Vec<String>,
}

impl Findings {
    /// One more thing is wrong.
    pub(crate) fn corrupt(&mut self, message: impl FnOnce() -> String) {
        self.corruptions = self.corruptions.saturating_add(1);
        if self.messages.len() < MESSAGES_MAX {
            self.messages.push(message());
        }
    }

    /// Tells something in words that costs no data. It leaves room for what does.
    pub(crate) fn say(&mut self, message: impl FnOnce() -> String) {
        if self.messages.len() < MESSAGES_MAX / 2 {
            self.messages.push(message());
        }
    }

    /// These are what is left after a repair of what `before` found.
    pub(crate) fn after_repair_of(mut self, before: &Self) -> Self {
        self.corruptions_fixed = before.corruptions.saturating_sub(self.corruptions);
        self.leaks_fixed = before.leaks.saturating_sub(self.leaks);
        let left = std::mem::take(&mut self.messages);
        self.messages.clone_from(&before.messages);
        self.messages.extend(left.iter().map(|message| format!("not repaired: {message}")));
        self.messages.truncate(MESSAGES_MAX);
        self
    }

    /// Whether nothing is wrong.
    pub fn is_clean(&self) -> bool {
        self.corruptions == 0 && self.leaks == 0 && self.errors == 0
    }
}

#[test]
fn any_number_of_leaks_leaves_room_for_damage() {
    let mut found = Findings::default();
    (0..2000).for_each(|_| found.say(|| "leaked".to_owned()));
    found.corrupt(|| "damaged".to_owned());
    assert_eq!(found.messages.last().map(String::as_str), Some("damaged"));
}
