CREATE TABLE note (id int PRIMARY KEY, text text NOT NULL);
